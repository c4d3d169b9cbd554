/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_PROBES_H
#define SNIFFER_PROBES_H

#include <linux/types.h>

u64 sniffer_probes_missed(void);
bool sniffer_probes_tell_messages(bool on);
void sniffer_probes_tell_joins(void (*joined)(void));
u32 sniffer_probes_registered(void);
u32 sniffer_probes_firing(void);
int sniffer_probes_init(void);
void sniffer_probes_exit(void);

#endif /* SNIFFER_PROBES_H */
