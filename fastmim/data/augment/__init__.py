"""What is drawn for the crops of a micro-batch, and the colors. Functions of the samples' seeds."""
