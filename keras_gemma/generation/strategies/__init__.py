"""Decoding strategies other than one token at a time.

beam.py          beam search
contrastive.py   contrastive search
speculative.py   speculative decoding
draft.py         draft tokens: a draft model, or prompt lookup
verify.py        acceptance and rejection of draft tokens
"""
