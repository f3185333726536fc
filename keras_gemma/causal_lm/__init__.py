"""Text to text: `GemmaCausalLM` and its parts.

model.py            GemmaCausalLM: methods that delegate to the functions of other folders
training.py         `fit` and `evaluate` on strings, with the loss in chunks
settings.py         generation settings
prompts.py          prompts as text, ids or a dictionary
text_request.py     one call: tokenize, generate, detokenize
completion.py       result with log-probabilities
chat.py             conversation that keeps its KV cache
draft.py            argument `draft`
"""
