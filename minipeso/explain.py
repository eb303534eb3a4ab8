def dry_run(cfg): pass
def explain(*a): pass
