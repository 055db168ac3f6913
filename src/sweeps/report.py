"""stub"""
def write_report(plan, store):
    pass
