"""What is behind the pytest plugin's fixtures; imported when a test first asks for one."""
