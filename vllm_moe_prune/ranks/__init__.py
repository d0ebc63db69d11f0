"""One job in several processes: which this is, and what they tell each other."""
