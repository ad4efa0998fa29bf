"""Better responses at inference time, one file a method."""
