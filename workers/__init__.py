"""What computes: input pipeline, dense TensorFlow model, step loop and training driver."""
