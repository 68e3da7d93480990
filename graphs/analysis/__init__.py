"""What passes find out about a graph without changing it: types, channels, residual streams, segments."""
