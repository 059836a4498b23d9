"""What executes strategies: the engine protocol, the engines, and how a URL becomes one."""
