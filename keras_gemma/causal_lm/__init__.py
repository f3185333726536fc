"""Text to text: `GemmaCausalLM` and its parts.

model.py            GemmaCausalLM
settings.py         generation settings
prompts.py          prompts as text, ids or a dictionary
text_request.py     one call: tokenize, generate, detokenize
completion.py       result with log-probabilities
chat.py             conversation that keeps its KV cache
conversational.py   chat methods of the model
draft.py            argument `draft`
model_of_text.py    `fit`, `evaluate` and `predict` on strings
training_step.py    training without the logits of a whole batch
"""
