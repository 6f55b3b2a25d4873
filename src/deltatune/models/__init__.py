"""Loading a base, finding its layers, putting methods on them, and the files that hold what was trained."""
