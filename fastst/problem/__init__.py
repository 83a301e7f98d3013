"""What a call computes, as plain data, and the checks of its arguments."""
