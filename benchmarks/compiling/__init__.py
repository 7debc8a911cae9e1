"""What the compile report is made of: building kernels without a GPU, and reading what came out."""
