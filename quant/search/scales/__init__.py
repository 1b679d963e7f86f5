"""Channel scales and clip ranges, chosen by the loss they leave."""
