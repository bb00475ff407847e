"""trainers: one method, one file, the loss at the top as a pure function, the loop below."""
