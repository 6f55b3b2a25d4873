"""What a run will cost before it starts: parameters, bytes and seconds; which method to choose under a budget."""
