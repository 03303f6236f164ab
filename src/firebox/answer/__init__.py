"""Prompt to answer: text → ids → engine → text. The one path that server, offline API and command line share.

A request becomes `n` answers. Iterating over an Answer gives pieces: everything that has arrived since the
last one, as text that is safe to show. An answer ends at an end-of-sequence or stop token, at a stop string,
or at its length.
"""

from firebox.answer.answer import Answer, Piece, aborting
from firebox.answer.params import SamplingParams
from firebox.answer.text_engine import TextEngine, load_text

__all__ = ["Answer", "Piece", "SamplingParams", "TextEngine", "aborting", "load_text"]
