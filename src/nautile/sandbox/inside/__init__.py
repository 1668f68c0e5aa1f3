"""What runs next to the tenant: standard library only, no other import of nautile. Sandboxes see this directory and no more."""
