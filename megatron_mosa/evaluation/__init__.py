"""What a trained model really achieves: losses with and without a view of the future, by position and by length."""
