"""Tuning files for SGLang and vLLM: what they are called, what stands in them, which tiles to put there.

names.py → where each server looks; products.py, tiles.py, times.py → what could run and how long it should
take; choose.py → the tile of each number of tokens; files.py writes and reads; predict.py does all of it.
"""
