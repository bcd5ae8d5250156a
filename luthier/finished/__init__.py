"""What is done with runs that have ended: predict, average, study, repeat, compare two folders."""
