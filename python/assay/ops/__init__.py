"""The ops: arguments are validated once here, the variant is picked, the kernel is called."""
