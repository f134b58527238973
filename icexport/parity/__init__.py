"""Does an engine compute what PyTorch computes in float32?"""
