"""Whether a bundle gives what its model gives: measured at export, replayed on a device."""
