/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_HOOKS_H
#define SNIFFER_HOOKS_H

int sniffer_hooks_init(void);
void sniffer_hooks_exit(void);

#endif /* SNIFFER_HOOKS_H */
