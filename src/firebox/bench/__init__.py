"""Measuring a server that speaks OpenAI's HTTP API, and judging tables that others measured.

    client, drive       requests, timed event by event, as many at once as there are places
    workloads/          what is sent; prompts, tokens: of which length, and how answers are counted
    guards/             whether the output can be an answer at all
    measures, row       what it comes to, or why there is no number
    laws, roofline      what no measurement can break; also for audit/, which reads published tables
    measure             all of it together; report/, store, compare: what becomes of it

Level 9: imports kernels, formats, llm, `engine.client`, text, planning and config; knows no model.
"""
