"""Who can compute a problem: one module or package each; ``contract`` says what each offers."""
