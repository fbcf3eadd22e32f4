"""Applications: the folders of samples and of users, and their templates made into objects."""
