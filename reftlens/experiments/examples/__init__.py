"""PyReFT's worked examples, each a call: memorisation, skills of subspaces, few-shot learning, a reward."""
