"""From files to batches. Knows nothing of models; needs Grain, TFDS (without TensorFlow), Pillow and scikit-learn."""
