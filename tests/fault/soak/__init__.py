"""The soak: a real server under a nemesis, and a checker of what happened (`make soak-server`).

learners (trainer.py) ──▶ proxy.py ──▶ ibtpo-server ──▶ reward_service.py
     │                                     ▲
     │ events.py        nemesis.py ────────┘ kills, stops, cuts, fills, turns clocks
     ▼                      │
 history.py             coverage.py
"""
