"""How much may happen at once: the way from a call or a queued prompt to the engine.

Each kind of room has one word and one file. Whoever waits, waits in order of coming, and what is
written on the right is all that it can wait for:

SampleTree call      queued prompt
      │                    │
      ▼                    ▼
   a permit             a permit        calls.py: of --max-calls, at most --max-waiting-calls wait;
      │                    │            the forest's `permits`: of --max-open-trees, taken while
      │                    │            slots would stay free
      ▼                    ▼
   a reservation ── the tree ──         admission.py: KV tokens for the tree's prefixes
      │  for each rollout
      ▼
   a slot                               slots.py: of --max-rollouts, by shares, then even between
      │                                 the trees of a kind
      ▼
   the gate                             gate.py: closed while weights are switched
      │
      ▼
   the engine                           as many as it runs at once, so none waits inside

Calls and queued prompts are two kinds (shares.py): neither takes the permits of the other, and of
reservations and slots each gets its share (--call-share) as soon as it wants it; what one does not
want the other may have. The deadline of a call's tree runs from the call on, on all this way.

When the server stops, grace.py says which of the growing trees are given the time that is left.
"""
