"""Reference networks in plain `torch.nn`, as papers and tutorials write them: what `fastgan.fuse` is shown on."""
