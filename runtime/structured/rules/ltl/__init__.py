"""Plans that satisfy a formula of linear temporal logic on finite traces (LTLf)."""
