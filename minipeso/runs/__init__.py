"""One run on a disk and a screen: set up, saved, gone on with, reported, asked."""
