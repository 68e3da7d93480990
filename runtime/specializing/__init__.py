"""Makes a bundle ready for the machine that it lies on."""
