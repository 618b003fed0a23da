"""The commands of the command line, one file each; every function is what its file's name says."""
