"""The one place where files that strangers made are read: bounded, checked, refused.

Only regular files are opened, so that nothing hangs or never ends; what is read of one
has a limit for its kind; JSON and YAML are checked for depth, size, names that come
twice and numbers that are none. A test sees that nobody else parses or reads.
"""
