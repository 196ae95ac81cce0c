"""A policy behind OpenAI's chat completions, for agents that exist already.

``protocol`` reads requests and writes answers, ``app`` says who is answered and when, ``server``
listens and drains, ``recording`` keeps what was said, ``cascade`` is student and teacher as one
engine, ``policies`` finds what a configuration names.
"""
