"""A text and its continuation: what a caller asks for, in ids, and the way back.

settings.py        everything that can be set, at `compile` and in a call
prompts.py         strings, lists of ids, padded arrays: read, and answered in kind
draft.py           who guesses tokens ahead
job.py             one batch on its way
output.py          what came of each prompt
chat.py            a conversation, whose turns share one cache
conversational.py  `chat` and `generate_chat`, for the model
"""
