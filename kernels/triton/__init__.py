"""What the Triton engines of all ops share: how a launch is made, and sums of scattered rows."""
