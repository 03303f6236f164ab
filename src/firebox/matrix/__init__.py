"""A resumable grid of server configurations: cells, their runs as processes, the verdict on each, the report.

Level 10: imports bench, planning and config; starts the command line as processes.

    spec, skip, cells     what is to be run, and in which order
    server, processes     one server, and every process it started
    run, store            the loop, and what survives a kill
    classify, feasible    what became of a cell; what need not be tried
    report, html          what it all shows: explain, ranking, profiles
"""
