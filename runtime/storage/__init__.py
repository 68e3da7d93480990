"""How a bundle lies on disk: as a folder, or packed into one file that is a program, too."""
