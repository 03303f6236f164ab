"""Output guards: whether what a server wrote can be an answer at all. Garbage often comes faster than text,
so a row of a benchmark whose output fails a guard has a verdict instead of a number; there is no switch
to allow it.

    watch = Watch()                       one a phase
    watch.see(number, piece)              each piece of each stream, as it comes
    watch.end(number, answer)             each stream's end; short streams are judged here
    watch.findings() + judge(answers)     when the phase is over

Both names are in `bench/watch.py`. Guards while streaming (a class `Guard`): one_token, suffix_loop,
ngram_flood, stagnation, invalid_utf8, empty. They see the text in blocks of 256 characters, reasoning
and content apart, and cost a few microseconds a token for all of them. Guards afterwards (a function
`judge`): same_text, same_rates, all_length, no_content, and reference, which compares with answers of a
server known to be right. A file's docstring says what it looks for, its thresholds and why, what good
text comes nearest, and which failure in the field it would have caught.

The streaming guards' thresholds hold for any text, so that no flag is needed for code, tables or other
scripts; what they miss is random but well-formed words, and answers that are fluent and wrong: that
takes `reference`. An answer that was asked to repeat ("write ha 500 times") is flagged: do not measure
with such a prompt.
"""
