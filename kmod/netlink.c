// SPDX-License-Identifier: GPL-2.0-only
/*
 * The Generic Netlink family: groups, commands, and the messages of both.
 * Initial network namespace only, CAP_NET_ADMIN for everything.
 */
#include <linux/llist.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/workqueue.h>
#include <net/genetlink.h>
#include <net/sock.h>

#include "batch.h"
#include "compat.h"
#include "netlink.h"
#include "owner.h"
#include "probes.h"

#define NETLINK_EVENTS_MAX	4096	/* process events that may wait to be sent */
#define NETLINK_HOLDERS_MAX	256	/* holders listed for one socket */

static struct genl_family netlink_family;

/**
 * sniffer_netlink_listening - does anybody want packets?
 */
bool sniffer_netlink_listening(void)
{
	return genl_has_listeners(&netlink_family, &init_net, SNIFFER_GROUP_INDEX_PACKETS);
}

/**
 * sniffer_netlink_snapping - does anybody want the packets' first bytes?
 */
bool sniffer_netlink_snapping(void)
{
	return genl_has_listeners(&netlink_family, &init_net, SNIFFER_GROUP_INDEX_SNAPS);
}

/**
 * sniffer_netlink_begin - start a multicast message of one growing attribute
 * @attr: enum sniffer_attr
 * @cmd: enum sniffer_cmd
 * @head: bytes at its start that are there from the beginning
 * @room: bytes that may be added after them
 * @data: set to the attribute's first byte, 8-aligned
 *
 * Any context.
 *
 * Return: the message or NULL.
 */
struct sk_buff *sniffer_netlink_begin(int attr, u8 cmd, size_t head, size_t room, void **data)
{
	struct sk_buff *skb;
	struct nlattr *nla;

	skb = genlmsg_new(nla_total_size(head + room), GFP_ATOMIC | __GFP_NOWARN);
	if (!skb)
		return NULL;
	if (!genlmsg_put(skb, 0, 0, &netlink_family, 0, cmd))
		goto free;
	nla = nla_reserve(skb, attr, head);
	if (!nla)
		goto free;
	*data = nla_data(nla);
	return skb;
free:
	nlmsg_free(skb);
	return NULL;
}

/**
 * sniffer_netlink_send - finish a message and multicast it
 * @skb: from sniffer_netlink_begin(); consumed
 * @group: to whom
 * @used: bytes written after the head
 *
 * Any context. Return: 0, or an error when nobody got it.
 */
int sniffer_netlink_send(struct sk_buff *skb, enum sniffer_group group, size_t used)
{
	struct nlmsghdr *nlh = nlmsg_hdr(skb);
	struct nlattr *nla = nlmsg_data(nlh) + GENL_HDRLEN;
	int err;

	skb_put(skb, used);
	nla->nla_len += used;
	nlh->nlmsg_len = skb->len;
	err = genlmsg_multicast_netns(&netlink_family, &init_net, skb, 0, group, GFP_ATOMIC);
	/* one with NETLINK_BROADCAST_ERROR had no room, and knows; others may have got it */
	return err == -ENOBUFS ? 0 : err;
}

/*
 * Process events are made in probe handlers, where nothing may be sent: they
 * wait in a list and a work item multicasts them.
 */
struct netlink_event {
	struct llist_node node;
	struct sniffer_process process;
};

static LLIST_HEAD(netlink_events);
static atomic_t netlink_waiting;
static atomic64_t netlink_event_lost;

static void netlink_send_event(const struct sniffer_process *process)
{
	struct sk_buff *skb;
	void *data;

	skb = sniffer_netlink_begin(SNIFFER_A_PROCESS, SNIFFER_CMD_PROCESS, sizeof(*process), 0,
				    &data);
	if (!skb) {
		atomic64_inc(&netlink_event_lost);
		return;
	}
	memcpy(data, process, sizeof(*process));
	sniffer_netlink_send(skb, SNIFFER_GROUP_INDEX_PROCESSES, 0);
}

static void netlink_send_events(struct work_struct *work)
{
	struct llist_node *list = llist_reverse_order(llist_del_all(&netlink_events));
	struct netlink_event *event, *next;

	llist_for_each_entry_safe(event, next, list, node) {
		netlink_send_event(&event->process);
		atomic_dec(&netlink_waiting);
		kfree(event);
	}
}

static DECLARE_WORK(netlink_event_work, netlink_send_events);

/**
 * sniffer_netlink_process - tell group "processes" about a process
 * @proc: under RCU or with a reference
 * @what: enum sniffer_event
 *
 * Any context, interrupts off included.
 */
void sniffer_netlink_process(const struct sniffer_proc *proc, u32 what)
{
	struct netlink_event *event;

	if (!genl_has_listeners(&netlink_family, &init_net, SNIFFER_GROUP_INDEX_PROCESSES))
		return;
	if (atomic_inc_return(&netlink_waiting) > NETLINK_EVENTS_MAX)
		goto lost;
	event = kmalloc(sizeof(*event), GFP_ATOMIC | __GFP_NOWARN);
	if (!event)
		goto lost;
	sniffer_process_describe(proc, what, &event->process);
	llist_add(&event->node, &netlink_events);
	queue_work(system_highpri_wq, &netlink_event_work);
	return;
lost:
	atomic_dec(&netlink_waiting);
	atomic64_inc(&netlink_event_lost);
}

/**
 * sniffer_netlink_process_lost - process events dropped since load
 */
u64 sniffer_netlink_process_lost(void)
{
	return atomic64_read(&netlink_event_lost);
}

/* Answers a command with one or two attributes. */
static int netlink_reply(struct genl_info *info, int attr, const void *data, size_t len,
			 int attr2, const void *data2, size_t len2)
{
	struct sk_buff *skb;
	void *head;

	skb = genlmsg_new(nla_total_size(len) + nla_total_size(len2), GFP_KERNEL);
	if (!skb)
		return -ENOMEM;
	head = genlmsg_put_reply(skb, info, &netlink_family, 0, info->genlhdr->cmd);
	if (!head || nla_put(skb, attr, len, data) ||
	    (attr2 && nla_put(skb, attr2, len2, data2))) {
		nlmsg_free(skb);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, head);
	return genlmsg_reply(skb, info);
}

static int netlink_get_info(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_info about = {
		.version = SNIFFER_VERSION,
		.record_size = sizeof(struct sniffer_record),
		.instance = sniffer_batch_instance(),
		.batch = sniffer_batch_size(),
		.flush_ms = sniffer_batch_flush_ms(),
		.max_sockets = sniffer_owner_max(),
		.sockets = sniffer_owner_count(),
		.processes = sniffer_process_count(),
		.probes_registered = sniffer_probes_registered(),
		.probes_firing = sniffer_probes_firing(),
		.canary = sniffer_probes_alive(),
	};

	return netlink_reply(info, SNIFFER_A_INFO, &about, sizeof(about), 0, NULL, 0);
}

static int netlink_get_counters(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_counters counters;

	sniffer_batch_counters(&counters);
	return netlink_reply(info, SNIFFER_A_COUNTERS, &counters, sizeof(counters), 0, NULL, 0);
}

static int netlink_set_config(struct sk_buff *skb, struct genl_info *info)
{
	unsigned int size = sniffer_batch_size(), interval = sniffer_batch_flush_ms();

	if (info->attrs[SNIFFER_A_BATCH])
		size = nla_get_u32(info->attrs[SNIFFER_A_BATCH]);
	if (info->attrs[SNIFFER_A_FLUSH_MS])
		interval = nla_get_u32(info->attrs[SNIFFER_A_FLUSH_MS]);
	if (size < 1 || size > SNIFFER_BATCH_MAX) {
		GENL_SET_ERR_MSG(info, "batch must be 1 to 252 records");
		return -ERANGE;
	}
	if (interval < 1 || interval > SNIFFER_FLUSH_MS_MAX) {
		GENL_SET_ERR_MSG(info, "flush interval must be 1 to 1000 ms");
		return -ERANGE;
	}
	sniffer_batch_configure(size, interval);
	return netlink_get_info(skb, info);
}

static int netlink_flush(struct sk_buff *skb, struct genl_info *info)
{
	unsigned int count = num_possible_cpus();
	struct sniffer_tail *tails;
	int err;

	tails = kvcalloc(count, sizeof(*tails), GFP_KERNEL);
	if (!tails)
		return -ENOMEM;
	count = sniffer_batch_flush(tails, count);
	err = netlink_reply(info, SNIFFER_A_TAILS, tails, count * sizeof(*tails), 0, NULL, 0);
	kvfree(tails);
	return err;
}

/* Under RCU. */
static void netlink_describe_socket(struct sniffer_owner *owner, struct sniffer_socket *out)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	memset(out, 0, sizeof(*out));
	out->cookie = owner->cookie;
	out->inode = owner->inode;
	out->creator = owner->creator;
	out->creator_start_ns = owner->creator_start;
	out->netns = owner->netns;
	out->flags = READ_ONCE(owner->flags);
	if (READ_ONCE(owner->dead) && !READ_ONCE(owner->via))
		out->flags |= SNIFFER_F_DEAD;
	out->family = owner->family;
	out->proto = owner->proto;
	out->sport = owner->port;
	memcpy(out->saddr, owner->addr, sizeof(out->saddr));
	if (user) {
		out->tgid = user->tgid;
		out->start_ns = user->start_ns;
		out->uid = READ_ONCE(user->uid);
		out->tid = READ_ONCE(owner->tid);
		memcpy(out->comm, user->comm, SNIFFER_COMM_LEN);
	}
}

/* Process context. */
static void netlink_add_holders(struct sniffer_socket *out, struct sniffer_holder *holders,
				unsigned int max)
{
	out->holders = sniffer_holders_list(out->cookie, holders, max);
	if (out->holders > 1)
		out->flags |= SNIFFER_F_SHARED;
}

static int netlink_get_socket(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_socket socket;
	struct sniffer_holder *holders;
	struct sniffer_owner *owner;
	int err = -ENOENT;

	if (!info->attrs[SNIFFER_A_COOKIE]) {
		GENL_SET_ERR_MSG(info, "attribute SNIFFER_A_COOKIE is missing");
		return -EINVAL;
	}
	holders = kcalloc(NETLINK_HOLDERS_MAX, sizeof(*holders), GFP_KERNEL);
	if (!holders)
		return -ENOMEM;
	rcu_read_lock();
	owner = sniffer_owner_find(nla_get_u64(info->attrs[SNIFFER_A_COOKIE]));
	if (owner)
		netlink_describe_socket(owner, &socket);
	rcu_read_unlock();
	if (owner) {
		netlink_add_holders(&socket, holders, NETLINK_HOLDERS_MAX);
		err = netlink_reply(info, SNIFFER_A_SOCKET, &socket, sizeof(socket),
				    SNIFFER_A_HOLDERS, holders,
				    min_t(u32, socket.holders, NETLINK_HOLDERS_MAX) *
				    sizeof(*holders));
	}
	kfree(holders);
	return err;
}

/* Where a dump stands lies in cb->args: bucket, index within it. */
static int netlink_dump_sockets(struct sk_buff *skb, struct netlink_callback *cb)
{
	unsigned int bucket = cb->args[0], index = cb->args[1];
	struct sniffer_holder holders[8];
	struct sniffer_socket socket;
	struct sniffer_owner *owner;
	unsigned int count;
	void *head;

	cb->seq = sniffer_owner_generation();
	for (;;) {
		rcu_read_lock();
		owner = sniffer_owner_next(&bucket, &index);
		if (owner)
			netlink_describe_socket(owner, &socket);
		rcu_read_unlock();
		if (!owner)
			break;
		netlink_add_holders(&socket, holders, ARRAY_SIZE(holders));
		count = min_t(u32, socket.holders, ARRAY_SIZE(holders));
		head = genlmsg_put(skb, NETLINK_CB(cb->skb).portid, cb->nlh->nlmsg_seq,
				   &netlink_family, NLM_F_MULTI, SNIFFER_CMD_GET_SOCKET);
		if (!head || nla_put(skb, SNIFFER_A_SOCKET, sizeof(socket), &socket) ||
		    nla_put(skb, SNIFFER_A_HOLDERS, count * sizeof(*holders), holders)) {
			if (head)
				genlmsg_cancel(skb, head);
			index--;
			break;
		}
		genl_dump_check_consistent(cb, head);
		genlmsg_end(skb, head);
	}
	cb->args[0] = bucket;
	cb->args[1] = index;
	return skb->len;
}

static int netlink_dump_processes(struct sk_buff *skb, struct netlink_callback *cb)
{
	unsigned int bucket = cb->args[0], index = cb->args[1];
	struct sniffer_process process;
	struct sniffer_proc *proc;
	void *head;

	cb->seq = sniffer_process_generation();
	rcu_read_lock();
	while ((proc = sniffer_process_next(&bucket, &index))) {
		sniffer_process_describe(proc, SNIFFER_EVENT_DUMP, &process);
		head = genlmsg_put(skb, NETLINK_CB(cb->skb).portid, cb->nlh->nlmsg_seq,
				   &netlink_family, NLM_F_MULTI, SNIFFER_CMD_GET_PROCESS);
		if (!head || nla_put(skb, SNIFFER_A_PROCESS, sizeof(process), &process)) {
			if (head)
				genlmsg_cancel(skb, head);
			index--;
			break;
		}
		genl_dump_check_consistent(cb, head);
		genlmsg_end(skb, head);
	}
	rcu_read_unlock();
	cb->args[0] = bucket;
	cb->args[1] = index;
	return skb->len;
}

static const struct nla_policy netlink_policy[SNIFFER_A_PAD + 1] = {
	[SNIFFER_A_COOKIE] = { .type = NLA_U64 },
	[SNIFFER_A_BATCH] = { .type = NLA_U32 },
	[SNIFFER_A_FLUSH_MS] = { .type = NLA_U32 },
};

static const struct genl_ops netlink_ops[] = {
	{
		.cmd = SNIFFER_CMD_GET_INFO,
		.flags = GENL_ADMIN_PERM,
		.doit = netlink_get_info,
	}, {
		.cmd = SNIFFER_CMD_GET_COUNTERS,
		.flags = GENL_ADMIN_PERM,
		.doit = netlink_get_counters,
	}, {
		.cmd = SNIFFER_CMD_SET_CONFIG,
		.flags = GENL_ADMIN_PERM,
		.doit = netlink_set_config,
	}, {
		.cmd = SNIFFER_CMD_FLUSH,
		.flags = GENL_ADMIN_PERM,
		.doit = netlink_flush,
	}, {
		.cmd = SNIFFER_CMD_GET_SOCKET,
		.flags = GENL_ADMIN_PERM,
		.doit = netlink_get_socket,
		.dumpit = netlink_dump_sockets,
	}, {
		.cmd = SNIFFER_CMD_GET_PROCESS,
		.flags = GENL_ADMIN_PERM,
		.dumpit = netlink_dump_processes,
	},
};

static const struct genl_multicast_group netlink_groups[] = {
	[SNIFFER_GROUP_INDEX_PACKETS] = {
		.name = SNIFFER_GROUP_PACKETS, .flags = SNIFFER_GROUP_FLAGS,
	},
	[SNIFFER_GROUP_INDEX_PROCESSES] = {
		.name = SNIFFER_GROUP_PROCESSES, .flags = SNIFFER_GROUP_FLAGS,
	},
	[SNIFFER_GROUP_INDEX_SNAPS] = {
		.name = SNIFFER_GROUP_SNAPS, .flags = SNIFFER_GROUP_FLAGS,
	},
};

static struct genl_family netlink_family __ro_after_init = {
	.name = SNIFFER_FAMILY,
	.version = SNIFFER_VERSION,
	.maxattr = SNIFFER_A_PAD,
	.policy = netlink_policy,
	.module = THIS_MODULE,
	.ops = netlink_ops,
	.n_ops = ARRAY_SIZE(netlink_ops),
	.mcgrps = netlink_groups,
	.n_mcgrps = ARRAY_SIZE(netlink_groups),
	SNIFFER_RESV_START_OP(SNIFFER_CMD_UNSPEC + 1)
};

int sniffer_netlink_init(void)
{
	int err = genl_register_family(&netlink_family);

	if (err == -EEXIST)
		pr_err("sniffer: another Generic Netlink family \"%s\" exists\n", SNIFFER_FAMILY);
	return err;
}

/* Probes and hooks are gone: no new events. */
void sniffer_netlink_exit(void)
{
	cancel_work_sync(&netlink_event_work);
	netlink_send_events(NULL);
	genl_unregister_family(&netlink_family);
}
