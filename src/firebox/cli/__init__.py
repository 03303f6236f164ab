"""The command line: one thin file a verb. A module here whose name is also a function or a Typer app in it is
a verb.
"""
