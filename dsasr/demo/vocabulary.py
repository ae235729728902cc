# ruff: noqa: SIM905 - word lists read better as text
"""The words and sentence forms of the demo's grammar.

A name in braces is a slot, filled from its list; fillers may contain slots. The words are chosen so
that a tiny model learns them in minutes: short sentences, no two fillers of a slot that sound
alike, no rare words.
"""

ENGLISH_FORMS = (
    "turn {onoff} the {room} {device}",
    "{operate} the {color} {device}",
    "{operate} the {room} {device} {soon}",
    "set the {device} to {tens} {degree}",
    "wake {name} at {number} {minutes}",
    "{contact} {name} {when}",
    "{contact} my {person} before {event}",
    "{contact} the {worker} on {day} {daytime}",
    "the {event} is on {month} {ordinal}",
    "{event} with {name} on {day} {daytime}",
    "move {event} to {month} {ordinal}",
    "book a {transport} to {city}",
    "the {transport} from {city} is {status}",
    "fly from {city} to {city} in {month}",
    "{drive} to the {place} in {city}",
    "is the {place} open on {day}",
    "how far is the {place} from {city}",
    "{name} is waiting at the {city} {place}",
    "the {weather} {daytime} in {city}",
    "{daytime} {event} with my {person}",
    "buy {number} {pack} of {food}",
    "{name} likes {food} and {food}",
    "add {food} to the {list} list",
    "{cook} the {food} for {tens} minutes",
    "i need a {quality} {color} {clothes}",
    "the {quality} {clothes} costs {tens} dollars",
    "is it {weather} in {city} {when}",
    "expect {storm} in {city} on {day}",
    "play {mood} {music} in the {room}",
    "play {mood} {music} for {name}",
    "the {color} {animal} is {doing}",
    "a {animal} is {doing} {where} the {furniture}",
    "put the {clothes} {where} the {furniture}",
    "tell me a {mood} story about {topic}",
    "my {person} is reading about {topic}",
    "{name} paid {tens} {number} dollars",
    "the {worker} bought a {quality} {furniture}",
    "{clean} the {furniture} in the {room}",
    "the {worker} will {clean} the {device}",
)

ENGLISH_SLOTS = {
    "onoff": ("on", "off"),
    "operate": ("open", "close", "check", "start", "stop"),
    "room": ("kitchen bedroom bathroom garage hallway garden office basement").split(),
    "device": ("lights heater television radio oven camera curtains speaker printer").split(),
    "degree": ("degrees", "percent"),
    "color": "red blue green yellow purple black white brown silver".split(),
    "soon": "please now again slowly".split(),
    "number": "one two three four five six seven eight nine ten eleven twelve".split(),
    "tens": "twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "minutes": ("fifteen", "thirty"),
    "contact": "call email visit invite thank".split(),
    "name": (
        "anna david maria peter sophie thomas laura kevin julia oscar emma victor felix grace "
        "simon henry alice martin olivia george"
    ).split(),
    "when": "today tonight tomorrow {day}".split(),
    "daytime": "morning evening afternoon".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday".split(),
    "month": (
        "january february march april may june july august september october november december"
    ).split(),
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth".split(),
    "event": ("breakfast lunch dinner school practice surgery yoga training").split(),
    "person": "mother father sister brother uncle cousin daughter husband".split(),
    "worker": "doctor dentist teacher plumber lawyer manager farmer pilot".split(),
    "transport": "train bus taxi flight ferry".split(),
    "status": "late early full cancelled ready".split(),
    "city": (
        "london paris tokyo berlin madrid chicago boston sydney toronto moscow vienna dublin "
        "athens cairo dallas seattle geneva"
    ).split(),
    "drive": "walk drive cycle".split(),
    "place": (
        "airport station museum hospital pharmacy park bridge restaurant market theater beach "
        "church stadium university castle"
    ).split(),
    "pack": "boxes bags bottles pounds".split(),
    "food": (
        "bread cheese apples bananas tomatoes potatoes rice noodles chicken salmon eggs butter "
        "sugar coffee yogurt mushrooms onions carrots lemons grapes honey"
    ).split(),
    "list": "shopping grocery".split(),
    "cook": "boil bake fry steam".split(),
    "quality": "cheap small large warm heavy modern wooden comfortable beautiful".split(),
    "clothes": "jacket shirt sweater coat scarf umbrella backpack dress watch".split(),
    "weather": "raining snowing cloudy sunny windy foggy".split(),
    "storm": "thunder hail lightning sunshine storms".split(),
    "mood": "happy quiet funny classic gentle".split(),
    "music": "jazz opera piano guitar violin songs".split(),
    "animal": "dog horse bird rabbit turtle elephant tiger monkey penguin".split(),
    "doing": "sleeping running hiding eating swimming jumping dancing".split(),
    "where": "under behind near beside".split(),
    "furniture": "table sofa chair window door carpet mirror".split(),
    "topic": "history science nature space robots dragons pirates money".split(),
    "clean": "clean paint repair".split(),
}

MANDARIN_FORMS = (
    "{operate}{room}的{device}",
    "请{operate}{room}{device}",
    "把{device}{adjust}",
    "{device}坏了请{worker}来修",
    "{when}{time}叫我起床",
    "{name}{time}去{doing}",
    "{person}在{room}里{doing}",
    "{person}喜欢{doing}和{doing}",
    "给{person}{contact}",
    "给{name}{contact}",
    "{name}的{person}是{worker}",
    "{when}坐{transport}去{city}",
    "从{city}到{city}的{transport}",
    "{city}{when}会{weather}吗",
    "{city}星期{weekday}{weather}",
    "{place}离{place}{distance}吗",
    "{worker}在{city}{place}等你",
    "我们{when}去{city}{place}",
    "{place}星期{weekday}开门吗",
    "我要买{number}斤{food}",
    "{food}和{food}多少钱",
    "{number}{drink}",
    "帮我{cook}一点{food}",
    "{person}爱吃{taste}{food}",
    "{person}买了一{clothes}",
    "这{clothes}真{quality}",
    "{color}的{animal}正在{action}",
    "{animal}在{room}{action}",
    "{name}养了{number}只{animal}",
    "播放{name}的{music}",
    "{name}最爱听{music}",
    "{month}月{day}号考{subject}",
    "{name}的{subject}很{skill}",
    "会议改到{month}月{day}号",
    "星期{weekday}{time}{number}点开会",
    "{furniture}在{room}{where}",
    "{color}{furniture}真{quality}",
)

MANDARIN_SLOTS = {
    "operate": "打开 关闭 启动 检查".split(),
    "room": "厨房 卧室 客厅 浴室 车库 阳台 花园".split(),
    "device": "电灯 空调 窗帘 电视 风扇 音箱 洗衣机 热水器".split(),
    "adjust": "调高 调低 搬走".split(),
    "worker": "医生 老师 律师 司机 警察 护士 经理".split(),
    "when": "今天 明天 后天 周末".split(),
    "time": "早上 中午 下午 晚上 半夜".split(),
    "name": "王芳 李强 张伟 刘洋 陈静 孙磊 郑敏 马超 林涛".split(),
    "person": "爸爸 妈妈 爷爷 奶奶 哥哥 姐姐 弟弟 妹妹 叔叔 邻居 朋友 同事".split(),
    "doing": ("跑步 跳舞 唱歌 游泳 画画 读报 写作业 聊天 喝茶 打球 下棋 爬山 拍照").split(),
    "contact": "打电话 发短信 寄礼物 留言 回邮件".split(),
    "transport": "火车 飞机 地铁 出租车 轮船 高铁".split(),
    "city": ("北京 上海 广州 深圳 杭州 成都 西安 武汉 南昌 香港 昆明 青岛 天津").split(),
    "weather": "下雨 下雪 刮风 打雷 结冰 降温".split(),
    "weekday": "一 二 三 四 五 六 日".split(),
    "place": (
        "机场 银行 医院 学校 超市 公园 图书馆 饭店 动物园 体育场 药房 海滩 剧院 邮局"
    ).split(),
    "distance": "远 近".split(),
    "number": "两 三 四 五 六 七 八 九 十".split(),
    "month": "一 二 三 四 五 六 七 八 九 十".split(),
    "day": "十 二十 三十 {number}".split(),
    "food": ("苹果 香蕉 葡萄 西瓜 草莓 面条 鸡蛋 豆腐 白菜 萝卜 羊肉 玉米 花生 辣椒").split(),
    "drink": "杯咖啡 瓶牛奶 碗豆汤 盒果汁".split(),
    "cook": "炒 煮 烤 蒸".split(),
    "taste": "甜 酸 新鲜".split(),
    "clothes": (
        "件{color}衬衫 条{color}裤子 条{color}裙子 顶{color}帽子 双{color}袜子 双皮鞋 件毛衣 "
        "把雨伞 块手表"
    ).split(),
    "quality": "便宜 贵 漂亮 舒服 结实".split(),
    "color": "红色 蓝色 绿色 黄色 黑色 白色 紫色 粉色".split(),
    "animal": "小狗 花猫 兔子 老虎 狮子 大象 猴子 乌龟 鸽子 松鼠".split(),
    "action": "睡觉 散步 吃草 玩球 奔跑 洗澡".split(),
    "music": "钢琴曲 摇滚 民谣 儿歌 京剧".split(),
    "subject": "数学 历史 英语 物理 化学".split(),
    "skill": "好 差 棒".split(),
    "furniture": "桌子 椅子 沙发 书架 镜子 地毯 床".split(),
    "where": "左边 右边 旁边 门口 中间".split(),
}

# Slots whose names start with "en_" come from the English lists.
MIXED_FORMS = (
    "给 {en_name} {contact}",
    "{en_name} {when}去{city}",
    "{when}坐{transport}去 {en_city}",
    "从 {en_city} 到{city}的{transport}",
    "播放{name}的 {en_music}",
    "{en_name} 喜欢{doing}",
    "我要买{number}斤 {en_food}",
    "星期{weekday}{time}有 {en_event}",
)
