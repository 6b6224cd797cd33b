"""The ranks of one configuration: started, watched and ended (launch.py), and what each does (worker.py)."""
