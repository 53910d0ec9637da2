"""The fast algebra in plain PyTorch: any device, no compiler."""
