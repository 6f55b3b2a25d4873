"""The loop that trains every method, and what stands around it: precision, schedule, evaluation, events."""
