"""placeholder"""
def train_flops_per_token(config, length):
    return 136e6
