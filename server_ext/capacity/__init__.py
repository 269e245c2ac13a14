"""How much may happen at once. Each kind of room has one word, and one file:

SampleTree call ──▶ a permit       calls.py      of --max-calls; --max-waiting-calls wait
queued prompt ────▶ a permit       (the forest)  of --max-open-trees
                      │
                      ▼
                  a reservation    admission.py  KV tokens for the tree's prefixes
                      │ each rollout
                      ▼
                  a slot           slots.py      of --max-rollouts; fair between trees
                      │
                      ▼
                  the gate         gate.py       closed while weights are switched

When the server stops, grace.py says which of the growing trees are given the time that is left.
"""
