"""What a log could have been: regret, failure modes, and what to change, in dollars."""
